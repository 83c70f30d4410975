"""Inodes and open handles of one guest, and the policy they are used under: flat tables without pointers, indexed by what the guest holds.

A nodeid or fh is (generation << 32) | index, so one that has been given back is never mistaken
for the slot's next user. Whoever works with a slot holds a reference (`inode_get`, `handle_get`):
it keeps the descriptor open while another queue forgets or releases, so a guest that lies can
never make an operation reach a descriptor that has become something else.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.sys._threads cimport pthread_mutex_t, sched_yield

cdef extern from "_atomics.h" nogil:
    uint8_t load_relaxed_u8(const uint8_t *p)
    void store_relaxed_u8(uint8_t *p, uint8_t v)
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    int add_int(int *p, int v)
    int cas_int(int *p, int expected, int desired)
    uint64_t load_acquire_u64(const uint64_t *p)
    void store_release_u32(uint32_t *p, uint32_t v)
    void store_release_u64(uint64_t *p, uint64_t v)
    int cas_u64(uint64_t *p, uint64_t expected, uint64_t desired)
    uint64_t add_u64(uint64_t *p, uint64_t v)
    void set_bits_u64(uint64_t *p, uint64_t bits)
    void clear_bits_u64(uint64_t *p, uint64_t bits)

cdef extern from * nogil:
    """
    #ifndef VFSD_SLOT_FLAG
    #define VFSD_SLOT_FLAG (UINT64_C(1) << 31)
    #endif
    """
    uint64_t BUSY "VFSD_SLOT_FLAG"              # an inode the evictor has for itself
    uint64_t OPEN "VFSD_SLOT_FLAG"              # a handle the guest has not released
    uint64_t WRITABLE "(VFSD_SLOT_FLAG >> 1)"   # a handle whose file nobody can execute meanwhile
    uint64_t REFERENCES "((VFSD_SLOT_FLAG >> 1) - 1)"

cdef enum:
    ID_SHIFT, ID_SQUASH, ID_FORBID

# What of a file the guest may have changed without having told us.
cdef enum:
    DIRTY_NOTHING
    DIRTY_PAGES                # stores through shared mappings
    DIRTY_SIZES                # what was written, and so the size (writeback cache)

# Where an inode came from, as long as that counts.
cdef enum:
    ORIGIN_ANY
    ORIGIN_DISK                # a directory whose inode was not in memory, until it is listed
    ORIGIN_TMPFILE             # a file that the guest made without a name, until it gives it one

# held_t.kind
cdef enum:
    HELD_NOTHING
    HELD_POSIX                 # by a descriptor of its own
    HELD_FLOCK                 # by a handle's

cdef enum:
    XATTR_PREFIX, XATTR_OK, XATTR_BAD, XATTR_UNSUPPORTED

cdef enum:
    XATTR_CLIENT = 1
    XATTR_SERVER = 2

cdef enum:
    NAME_BYTES = 256           # a name's room, with the NUL (NAME_MAX, XATTR_NAME_MAX)
    INODES_MAX = 1 << 24       # slots; address space is reserved, memory comes with use
    HANDLES_MAX = 1 << 20
    BUCKETS = 1 << 18
    SHARDS = 64                # locks over the buckets
    MOUNTS_MAX = 256
    LISTINGS = 256             # open directories whose host entries are kept between two READDIRs
    LISTING_BYTES = 32752
    UNOPENED_MAX = 256         # files the guest reads without having opened them that are kept open
    LONG_NAMES_MAX = 1 << 20   # names that a note has no room for
    HANDLE_BYTES_MAX = 64      # room for a host file handle; larger ones are not used
    SHORT_NAME = 44            # bytes of a name within a note, with the NUL
    LONG_NAME = 256
    BY_NAME = 0xffff
    HELD_MAX = 1 << 20         # descriptors that can hold locks
    TOLD_MAX = 1024            # callers that were answered ESTALE and may ask once more
    ALIVE_MAX = 256            # directories that were there when looked at
    SEEN_NAMES = 1 << 16       # names that are likely to be in the host's memory


cdef struct note_t:            # 72 bytes: what brings an evicted inode back
    uint16_t how               # 0: nothing noted; BY_NAME; or by handle, below the mount of index how - 1
    uint16_t handle_type
    uint16_t handle_bytes
    uint16_t padding
    uint8_t bytes[HANDLE_BYTES_MAX]  # the handle, or a named_t


cdef struct named_t:           # 64 bytes
    uint64_t parent            # nodeid
    uint64_t born              # tells it from another inode that has got its number; 0: not known
    uint32_t long_name         # where the name is, 0: here
    char name[SHORT_NAME]


cdef struct long_name_t:
    uint32_t next              # free list
    char name[LONG_NAME]


cdef struct inode_t:           # 128 bytes
    uint64_t state             # generation << 32 | BUSY | references; a looked-up inode holds one
    uint64_t dev
    uint64_t ino
    uint64_t mnt_id
    uint64_t nlookup           # under the shard's lock
    uint32_t next              # hash chain, or free list
    int fd                     # O_PATH anchor, -1 while evicted
    uint16_t mode              # S_IFMT bits
    uint8_t kill               # the next FALLOCATE or copy takes set-id bits away
    uint8_t cached             # parts of a file may be in the guest's page cache
    uint8_t used               # how often the evictor's hand passes before it takes the anchor
    uint8_t mapped             # a file with parts in the DAX window
    uint8_t finds_new          # a directory in which the last name looked up led to a new inode
    uint8_t origin             # ORIGIN_*
    note_t note                # written by the evictor alone


cdef struct handle_t:          # 32 bytes
    uint64_t state             # generation << 32 | OPEN | WRITABLE | references; an open handle holds one
    int fd
    uint32_t inode             # index of what it was opened on; the free list's next while it is free
    int other_fd               # the same file open with O_DIRECT if fd is not, without if it is; -1: not needed yet
    int flags                  # of open(2), as the guest gave them and as far as they reach the host
    bint dirties               # counted in `dirtiers`


cdef struct place_t:           # an inode that is referenced, and its descriptor
    uint32_t index
    int fd


# Host entries an open directory's last READDIR has read and not passed on: a reply holds fewer.
cdef struct listing_t:
    uint64_t fh
    bint slow                  # the last lookups of entries took long
    int64_t offset             # of the entry at `at`
    bint stands                # the directory's descriptor stands there
    uint32_t at
    uint32_t n
    int busy
    char entries[LISTING_BYTES]


cdef struct unopened_t:
    pthread_mutex_t lock
    uint64_t nodeid            # 0: none
    uint64_t fh


# What a descriptor holds locks for (see vfsd.hostfs.lock), by its number: the locks themselves the host knows.
cdef struct held_t:            # 32 bytes
    uint64_t number            # of the owner
    uint64_t through           # POSIX: the fh that its last lock was asked for with
    uint32_t pid               # of that, as the guest numbers it
    int reads_only
    uint32_t padding
    uint32_t kind              # HELD_*


cdef struct mount_t:
    uint64_t mnt_id
    uint32_t users             # notes
    int fd                     # readable descriptor for open_by_handle_at; -1: handles don't work there


cdef struct id_range_t:        # 16 bytes, as vfsd.hostfs.ids.idmap packs it
    uint32_t first
    uint32_t last
    uint32_t to
    uint32_t how               # ID_*


cdef struct id_map_t:          # one direction, sorted, without overlaps; an id in no range is itself
    const id_range_t *ranges
    uint32_t n


cdef packed struct xattr_rule_t:  # 518 bytes, as vfsd.hostfs.ids.xattrmap packs it
    uint8_t kind               # XATTR_*
    uint8_t scope              # XATTR_CLIENT, XATTR_SERVER
    uint16_t key_bytes
    uint16_t prepend_bytes
    char key[256]
    char prepend[256]


cdef struct caps_t:            # __user_cap_data_struct, 32 capabilities
    uint32_t effective
    uint32_t permitted
    uint32_t inheritable


cdef struct tables_t:
    inode_t *inodes
    handle_t *handles
    uint32_t *buckets          # index of the first inode, 0 = none
    listing_t *listings
    int *dirtiers              # by inode: handles through which the guest may have such changes
    uint64_t *anchored         # a bit for each inode: it has an anchor that could be evicted
    long_name_t *long_names
    uint64_t *seen_names       # by hash: its upper half, and the inode found or ABSENT; see lookup()
    uint32_t inodes_top        # slots ever used
    uint32_t inodes_free       # head of the free list, 0 = empty
    uint32_t handles_top
    uint32_t handles_free
    uint32_t long_names_top
    uint32_t long_names_free
    uint64_t n_inodes
    uint64_t n_handles
    uint64_t n_anchors         # O_PATH descriptors held
    uint64_t n_descriptors     # all others that the guest is the reason for, or that are about to be opened
    uint64_t n_by_name         # inodes that are evicted and come back by name
    uint64_t fds_max           # anchors and handles this guest may hold; anchors give way
    uint64_t handles_max       # for n_descriptors
    uint64_t evict_at          # so many descriptors are a reason to evict
    uint64_t evicted           # anchors closed to stay within the budget
    uint64_t names_left_out    # entries that no listing had, as their names are too long
    uint32_t hand              # of the evictor
    uint32_t unopened_hand     # where to look next for a file of `unopened` to close
    bint file_handles          # use them
    mount_t mounts[MOUNTS_MAX]
    uint32_t n_mounts
    uint64_t entry_valid
    uint64_t attr_valid
    uint64_t negative_valid    # of a name that is not there
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    uint32_t negative_valid_nsec
    # Policy, compiled into plain values before the first request.
    uint32_t open_flags        # FOPEN_* of the reply to OPEN and CREATE
    uint32_t noflush_flags     # more of them where close(2) never fails
    uint32_t direct_flags      # more of them for a file opened with O_DIRECT
    uint32_t opendir_flags
    int pass_flags             # what of open(2)'s flags the guest may choose
    int follow_flags           # those of a file that the guest may change later, and a host's descriptor has
    uint32_t read_waits        # f_flags with which READ always waits for a disk
    uint32_t write_waits
    uint64_t writes_slow_until # ms of CLOCK_MONOTONIC_COARSE: WRITE had to wait lately
    bint xattr
    bint file_capabilities     # the guest may store some that are the host's
    bint readonly              # nothing is opened for writing; Dispatch.refuse keeps out the rest
    uint64_t dax_size_min      # FUSE_ATTR_DAX for regular files of that size, UINT64_MAX: none
    uint64_t dax_size_mask     # and with none of these bits in it
    bint dax_writable          # and that may be written
    bint dax_marked            # and for those with FS_XFLAG_DAX
    bint submounts             # mark directories that are mounts of their own
    # Of the root's file system; what is mounted below may be another: see on_root_file_system().
    bint in_memory             # it has no disk: nothing blocks
    bint never_revalidates     # it believes the names in its memory
    bint close_never_fails
    bint walks_tell            # the kernel can tell of a name that it would have to wait for it
    id_map_t uid_to_host
    id_map_t gid_to_host
    id_map_t uid_to_guest
    id_map_t gid_to_guest
    const xattr_rule_t *xattr_rules
    uint32_t n_xattr_rules
    char capability[NAME_BYTES]  # where the guest's security.capability lies, if the kernel does not know; or ""
    bint flock                 # locks are the host's; else the guest keeps them to itself
    bint posix_lock
    void *locks                # the share's locks_t, if either
    held_t *held               # by descriptor
    uint32_t held_top          # descriptors from here on hold none
    uint64_t n_locks           # what of this guest is in there or may be in a moment
    uint64_t n_ranges          # under the lock of locks_t
    # Agreed in INIT.
    bint writeback             # the guest keeps what is written, and sizes and times of files
    int dirty                  # DIRTY_*
    bint maps_all              # it maps every regular file (DAX), and caches none
    bint zero_open             # it opens no files: fh 0 stands for the inode
    bint posix_acl
    bint killpriv_v2
    bint setxattr_ext
    bint security_ctx
    bint supp_group
    int proc_fd                # /proc/self/fd: names what an O_PATH descriptor stands for
    int selinux_proc_fd        # /proc, where SELinux labels what is made and labels are passed on; else -1
    uint32_t uid               # the daemon's own
    uint32_t gid
    caps_t caps[2]
    pthread_mutex_t shard[SHARDS]
    pthread_mutex_t alloc      # free lists, tops
    pthread_mutex_t evict      # hand, notes
    pthread_mutex_t mount      # mounts
    uint64_t told[TOLD_MAX]    # by pid: pid << 32 | the inode's index, 0: none; see _gone.pxd
    uint64_t told_until[TOLD_MAX]  # ms of CLOCK_MONOTONIC_COARSE
    uint64_t alive[ALIVE_MAX]  # by inode: index << 32 | ms of CLOCK_MONOTONIC_COARSE
    unopened_t unopened[UNOPENED_MAX]  # by nodeid % UNOPENED_MAX


cdef inline uint64_t generation_of(uint64_t state) noexcept nogil:
    return state >> 32


cdef inline bint reference(uint64_t *state, uint64_t generation, uint64_t wanted, uint64_t busy) noexcept nogil:
    """Take a reference if the slot is alive, of that generation and has the `wanted` bits."""
    cdef uint64_t seen
    while True:
        seen = load_acquire_u64(state)
        if generation_of(seen) != generation or (seen & REFERENCES) == 0 or (seen & wanted) != wanted:
            return False
        if seen & busy:
            sched_yield()
        elif cas_u64(state, seen, seen + 1):
            return True


cdef inline bint on_root_file_system(const tables_t *t, uint64_t nodeid) noexcept nogil:
    """Whether what is known of the root's file system is known of that inode's, by nodeid or index."""
    return t.inodes[<uint32_t>nodeid & (INODES_MAX - 1)].dev == t.inodes[FUSE_ROOT_ID].dev


cdef inline bint never_blocks(const tables_t *t, uint64_t nodeid) noexcept nogil:
    return t.in_memory and on_root_file_system(t, nodeid)


cdef inline bint walk_may_wait(const tables_t *t, uint32_t index) noexcept nogil:
    """Whether a name in that directory may have to be read from a disk, and the kernel can tell so beforehand."""
    return t.walks_tell and not never_blocks(t, index)


cdef inline bint believes_names(const tables_t *t, uint32_t index) noexcept nogil:
    """Whether a name of that directory that is in the host's memory is looked up without asking anybody."""
    return t.never_revalidates and on_root_file_system(t, index)
