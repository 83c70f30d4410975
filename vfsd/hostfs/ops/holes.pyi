from vfsd.fuse.dispatch import Dispatch
from vfsd.hostfs.table._tables import Tables

__all__ = ("install",)

def install(dispatch: Dispatch, tables: Tables) -> None: ...
