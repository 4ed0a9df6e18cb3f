"""From a checkout, what `dpojax recipe` does: see dpojax/commands/recipe.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("recipe")
