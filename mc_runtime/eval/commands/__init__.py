"""The subcommands of `mc eval`, one file each.

What takes long to import (torch, matplotlib) is imported when a command runs.
"""
