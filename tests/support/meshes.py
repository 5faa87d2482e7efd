"""Ways to lay out eight devices."""

# fsdp x tensor; the last with data besides.
MESHES = {
    "8x1": {"fsdp": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "2x4": {"fsdp": 2, "tensor": 4},
    "1x8": {"tensor": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
