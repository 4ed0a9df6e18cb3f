"""From a checkout, what `dpojax inspect-data` does: see dpojax/commands/inspect_data.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("inspect-data")
