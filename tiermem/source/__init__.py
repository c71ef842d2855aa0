"""Sources: where bytes of a checkpoint come from. One kind of source a file; today `file`."""
