"""Models larger than the device: layers in the host's memory, streamed through the device."""
