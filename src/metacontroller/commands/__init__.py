"""The commands of the command line, each a dataclass of its options that is called to run it."""
