"""Guest memory: regions, translation, what is cut off."""
