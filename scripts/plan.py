"""From a checkout, what `dpojax plan` does: see dpojax/commands/plan.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("plan")
