"""Another library's names; its modules are imported beside ours, as ``metacontroller.metacontroller``."""
