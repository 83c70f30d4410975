"""vfsd in virtiofsd's place: its command line, its pid file, its life."""
