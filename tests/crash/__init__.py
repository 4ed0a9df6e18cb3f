"""Kill a run, tear its writes, fill its disk, flip its bits, and see what comes of it."""
