"""vfsd doctor: whether this host, a shared directory, a daemon and a front end fit together."""
