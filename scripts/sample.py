"""From a checkout, what `dpojax sample` does: see dpojax/commands/sample.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("sample")
