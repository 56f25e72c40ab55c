"""The process and the machine: heap, compilation cache, devices, signals, memory, and hardware limits."""
