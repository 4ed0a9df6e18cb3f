"""From a checkout, what `dpojax frontier` does: see dpojax/commands/frontier.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("frontier")
