"""Which sample, with which seed, and how it reaches the device."""
