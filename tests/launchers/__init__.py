"""What starts virtiofsd, with vfsd-virtiofsd in its place."""
