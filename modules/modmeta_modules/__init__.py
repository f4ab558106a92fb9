"""The adapter modules that ship with modmeta, one file each, found through entry points."""
