"""Jobs as data, and what carries out a plan of them: this process, or several local ones."""
