"""An emulator of Gluon's Hopper subset: runs kernels' own source on the CPU. README.md says what it models."""
