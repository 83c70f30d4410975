"""Names of extended attributes between guest and host (vfsd.hostfs.ids.xattrmap has the rules)."""

from vfsd.hostfs.table._slots cimport tables_t

# A guest's name becomes the host's, in place (NAME_BYTES of room): 0, -EPERM refused, -EOPNOTSUPP not
# supported, -ERANGE too long then.
cdef int name_to_host(const tables_t *t, char *name) noexcept nogil
# Whether the guest may store that attribute of the host: 0 or -EPERM. The kernel refuses other names that
# count on the host (trusted.*, security.*) to a server without CAP_SYS_ADMIN; CAP_SETFCAP it has, so that the
# guest can take file capabilities away.
cdef int may_store(const tables_t *t, const char *host_name) noexcept nogil
# The guest's name of a host's, a part of it; NULL when it is hidden.
cdef const char *name_to_guest(const tables_t *t, const char *name) noexcept nogil
