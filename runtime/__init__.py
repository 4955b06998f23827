"""The machine room. Whatever module of it comes first, threads wait passively before it loads torch."""

import runtime.threads
