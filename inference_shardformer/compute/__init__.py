"""The compute choices beside attention: linear, norm and activation kernels, selected once and bound to modules."""
