"""The host's file system as a guest sees it: inodes, handles and every operation's home."""
