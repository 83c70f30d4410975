"""vhost-user: messages, the device side (backend), the driver side (frontend), memory regions."""
