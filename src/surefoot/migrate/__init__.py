"""Coming from other libraries; removable."""
