"""From a checkout, what `dpojax train` does: see dpojax/commands/train.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("train")
