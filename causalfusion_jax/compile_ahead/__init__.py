"""What a program needs and does on a TPU slice, from compiling it without one."""
