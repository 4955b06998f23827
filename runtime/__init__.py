"""The machine room. Whatever is imported of it, threads wait passively and bitsandbytes is quiet."""

import runtime.threads

import logging

# PEFT imports it, and it advertises a package that is not needed here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
