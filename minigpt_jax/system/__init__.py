"""The process and the machine: heap, compiled programs, devices, signals, memory, and what the hardware can do."""
