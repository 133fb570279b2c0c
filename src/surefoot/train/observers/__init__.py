"""Who sees a run go by: the display, TensorBoard, trackers."""
