from vfsd.cli import main

main()
