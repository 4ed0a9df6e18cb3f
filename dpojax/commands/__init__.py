"""The commands of `dpojax`: one file each, and `entry`, which starts one by its name."""
