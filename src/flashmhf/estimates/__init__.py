"""What a model costs without running it: parameters, FLOPs, saved bytes; memory and hours on several GPUs."""
