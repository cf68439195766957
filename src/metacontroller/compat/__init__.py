"""Another library's names; its modules are imported beside the house's, as ``metacontroller.metacontroller``."""
