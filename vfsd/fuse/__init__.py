"""The FUSE protocol: structures, INIT, the table of operations and their dispatch."""
