"""From a checkout, what `dpojax chat` does: see dpojax/commands/chat.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("chat")
