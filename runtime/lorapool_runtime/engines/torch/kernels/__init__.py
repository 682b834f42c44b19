"""What is below torch operators: native CPU kernels, Triton kernels, and the memory they work on."""
