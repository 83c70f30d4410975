"""Translation of ids and of attributes' names; credentials."""
