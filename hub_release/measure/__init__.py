"""Tables of memory, FLOPs and seconds at the sizes of real VLMs."""
