from vfsd.fuse.dispatch import Dispatch
from vfsd.hostfs._tables import Tables

def install(dispatch: Dispatch, tables: Tables) -> None: ...
