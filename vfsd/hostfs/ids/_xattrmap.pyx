"""Names of extended attributes between guest and host."""

from libc.errno cimport EOPNOTSUPP, EPERM, ERANGE
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memmove, strcmp, strlen, strncmp

from vfsd.hostfs.table._slots cimport (
    NAME_BYTES, XATTR_BAD, XATTR_CLIENT, XATTR_OK, XATTR_PREFIX, XATTR_SERVER, tables_t, xattr_rule_t,
)

from vfsd.hostfs.ids.xattrmap import RULE, Kind, Scope

assert sizeof(xattr_rule_t) == RULE.size
assert (XATTR_PREFIX, XATTR_OK, XATTR_BAD) == (Kind.PREFIX, Kind.OK, Kind.BAD)
assert (XATTR_CLIENT, XATTR_SERVER) == (Scope.CLIENT, Scope.SERVER)


cdef bint is_unused_acl(const tables_t *t, const char *name) noexcept nogil:
    # Without FUSE_POSIX_ACL the guest would not enforce what it stores.
    return not t.posix_acl and (strcmp(name, b"system.posix_acl_access") == 0
                                or strcmp(name, b"system.posix_acl_default") == 0)


cdef int name_to_host(const tables_t *t, char *name) noexcept nogil:
    cdef const xattr_rule_t *rule
    cdef uint32_t i
    cdef size_t n
    if is_unused_acl(t, name):
        return -EOPNOTSUPP
    if t.n_xattr_rules == 0:
        return 0
    for i in range(t.n_xattr_rules):
        rule = &t.xattr_rules[i]
        if not rule.scope & XATTR_CLIENT or strncmp(name, rule.key, rule.key_bytes) != 0:
            continue
        if rule.kind == XATTR_OK:
            return 0
        if rule.kind != XATTR_PREFIX:
            return -EPERM if rule.kind == XATTR_BAD else -EOPNOTSUPP
        n = strlen(name)
        if n + rule.prepend_bytes >= NAME_BYTES:
            return -ERANGE
        memmove(name + rule.prepend_bytes, name, n + 1)
        memcpy(name, rule.prepend, rule.prepend_bytes)
        return 0
    return -EPERM


cdef int may_store(const tables_t *t, const char *host_name) noexcept nogil:
    if not t.file_capabilities and strcmp(host_name, b"security.capability") == 0:
        return -EPERM
    return 0


cdef const char *name_to_guest(const tables_t *t, const char *name) noexcept nogil:
    cdef const char *shown = name
    cdef const xattr_rule_t *rule
    cdef uint32_t i
    if t.n_xattr_rules:
        shown = NULL
        for i in range(t.n_xattr_rules):
            rule = &t.xattr_rules[i]
            if not rule.scope & XATTR_SERVER or strncmp(name, rule.prepend, rule.prepend_bytes) != 0:
                continue
            if rule.kind == XATTR_OK:
                shown = name
            elif rule.kind == XATTR_PREFIX:
                shown = name + rule.prepend_bytes
            break
    # An empty name would spoil the whole list for Linux (fuse_verify_xattr_list).
    if shown == NULL or shown[0] == 0 or is_unused_acl(t, shown):
        return NULL
    return shown
