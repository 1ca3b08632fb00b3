// SPDX-License-Identifier: Apache-2.0
/*
 * A handler in C on the bare ring: what any program sees of a zero-copy device, and the floor that the
 * benchmark compares handlers in TypeScript with.
 *
 *     consumer /dev/uioN BYTES memory           a RAM disk: loads and stores
 *     consumer /dev/uioN BYTES threads          the same, each command's data moved by four threads at once
 *     consumer /dev/uioN BYTES null             GOOD to every READ and WRITE, no byte touched
 *     consumer /dev/uioN BYTES file PATH        pread and pwrite
 *     consumer /dev/uioN BYTES direct PATH      the same with O_DIRECT, on the pages themselves
 *     consumer /dev/uioN BYTES careless PATH    starts O_DIRECT and answers GOOD without waiting for it
 *     consumer /dev/uioN BYTES probe PATH       a RAM disk that misbehaves by LBA: see probes[]
 *     consumer /dev/uioN BYTES hold             touches the data of a READ or WRITE and never completes it
 *
 * One thread, commands in order, one doorbell a batch. Prints `ready`, then a line for each probe: `probe
 * NAME ok`, or `probe NAME FAIL` and why. Offsets are those of <linux/target_core_user.h>, written out:
 * the header installed here knows nothing of zero copy.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, BLOCK = 512, MIB = 1 << 20 };
enum { KFLAG_ZERO_COPY = 1, KFLAG_KEEP_BUF_OK = 2, KFLAG_DIRECT_IO = 4, KFLAG_DATA_IN = 8 };
enum { UFLAG_READ_LEN = 2, UFLAG_KEEP_BUF = 4 };
enum { GOOD = 0, CHECK_CONDITION = 2 };

struct mailbox {
  uint16_t version, flags;
  uint32_t cmdr_off, cmdr_size, cmd_head;
  uint64_t zc_off, zc_size;
  uint8_t pad[32];
  uint32_t cmd_tail;
};
struct iov {
  uint64_t base, len;
};
struct entry {
  uint32_t len_op;
  uint16_t cmd_id;
  uint8_t kflags, uflags;
  union {
    struct {
      uint32_t iov_cnt, iov_bidi_cnt, iov_dif_cnt, pad;
      uint64_t cdb_off, pad1, pad2;
      struct iov iov[];
    };
    struct {
      uint8_t status, pad3[3];
      uint32_t read_len;
      uint8_t sense[96];
    };
  };
};

/* The data of a command, copied out of its entry: the response overlays the iovecs. */
struct command {
  const uint8_t *cdb;
  uint8_t kflags;
  struct iov iov[2048];
  unsigned count, bidi;
  size_t bytes;
};

static int uio = -1, backing = -1;
static size_t map_bytes, disk_bytes;
static uint8_t *map, *disk;
static const char *mode, *path;
static volatile struct mailbox *mb;
static uint64_t served;

static void die(const char *what) {
  perror(what);
  exit(1);
}

/* --- touching memory that may not be there --- */

static sigjmp_buf trap;
static volatile sig_atomic_t trapping;

static void on_sigbus(int signal) {
  if (trapping) siglongjmp(trap, 1);
  struct sigaction standard = {.sa_handler = SIG_DFL};
  sigaction(signal, &standard, NULL);
}

/* 1: the access raised SIGBUS. */
static int refused(volatile uint8_t *at, int store) {
  trapping = 1;
  const int caught = sigsetjmp(trap, 1);
  if (!caught) {
    if (store)
      *at = 0xee;
    else
      (void)*at;
  }
  trapping = 0;
  return caught;
}

static int probe_failed;
static void expect(int holds, const char *format, ...) {
  if (holds) return;
  if (!probe_failed) printf("probe FAIL:");
  probe_failed = 1;
  va_list arguments;
  va_start(arguments, format);
  printf(" ");
  vprintf(format, arguments);
  printf(" (errno %d);", errno);
  va_end(arguments);
}

static uint8_t *at(const struct command *c, unsigned i) { return map + c->iov[i].base; }

/* --- probes: each has a MiB of the disk, in this order --- */

/* Run once the doorbell has been rung. */
static void (*afterwards)(void);
static uint8_t *late, *elsewhere, *second_map;
static pid_t child;
static int to_child[2], from_child[2];

static int file_for(int flags) {
  const int fd = open(path, O_RDWR | O_CREAT | flags, 0600);
  if (fd < 0) die(path);
  return fd;
}

static void read_only(struct command *c) {
  uint8_t *data = at(c, 0);
  const uint8_t first = data[0];
  expect(refused(data, 1), "a store into Data-Out was taken");
  expect(refused(data + c->bytes - 1, 1), "a store into the last byte of Data-Out was taken");
  const int fd = file_for(0);
  expect(pwrite(fd, data, c->bytes, 0) == (ssize_t)c->bytes, "write() of Data-Out");
  expect(pread(fd, data, PAGE, 0) < 0 && errno == EFAULT, "read() into Data-Out");
  close(fd);
  expect(mprotect(data, c->bytes, PROT_READ) == 0, "mprotect read-only");
  expect(data[0] == first, "Data-Out read after mprotect");
  expect(mprotect(data, c->bytes, PROT_READ | PROT_WRITE) == 0, "mprotect writable");
  expect(refused(data, 1), "a store after mprotect was taken");
  expect(data[0] == first, "Data-Out changed");
}

static void late_touches(void) {
  expect(refused(late, 0), "a late load was answered");
  expect(refused(late, 1), "a late store was taken");
  const int fd = file_for(0);
  expect(pwrite(fd, late, PAGE, 0) < 0 && errno == EFAULT, "a late write()");
  expect(pread(fd, late, PAGE, 0) < 0 && errno == EFAULT, "a late read()");
  int ends[2];
  if (pipe(ends)) die("pipe");
  struct iovec vector = {late, PAGE};
  expect(vmsplice(ends[1], &vector, 1, 0) < 0, "a late vmsplice()");
  close(ends[0]);
  close(ends[1]);
  close(fd);
}

static void late_use(struct command *c) {
  late = at(c, 0);
  expect(!refused(late, 0), "a load in time was refused");
  afterwards = late_touches;
}

static void mapped_elsewhere(void) {
  expect(refused(late, 0), "a late load");
  expect(refused(elsewhere, 0), "a late load through another mapping");
  expect(refused(elsewhere, 1), "a late store through another mapping");
  char answer = 0;
  if (write(to_child[1], "x", 1) != 1 || read(from_child[0], &answer, 1) != 1) die("child");
  expect(answer == 'y', "a late load in a forked process");
  int status;
  waitpid(child, &status, 0);
  munmap(second_map, map_bytes);
  close(to_child[0]), close(to_child[1]), close(from_child[0]), close(from_child[1]);
}

static void elsewhere_too(struct command *c) {
  late = at(c, 0);
  second_map = mmap(NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, uio, 0);
  if (second_map == MAP_FAILED) die("second mmap");
  elsewhere = second_map + c->iov[0].base;
  expect(mmap(NULL, map_bytes, PROT_READ, MAP_PRIVATE, uio, 0) == MAP_FAILED,
         "a private mapping was made");
  expect(!memcmp(late, elsewhere, c->bytes), "two mappings differ");
  if (pipe(to_child) || pipe(from_child)) die("pipe");
  fflush(stdout);
  child = fork();
  if (child == 0) {
    char go;
    /* In flight: the child sees what the parent sees, also what the parent has not touched. */
    int good = !refused(late, 0) && !refused(late + c->bytes - 1, 0) && refused(late, 1);
    if (write(from_child[1], "r", 1) != 1 || read(to_child[0], &go, 1) != 1) _exit(1);
    good = good && refused(late, 0) && refused(late + c->bytes - 1, 0);
    if (write(from_child[1], good ? "y" : "n", 1) != 1) _exit(1);
    _exit(0);
  }
  char ready;
  if (read(from_child[0], &ready, 1) != 1) die("child");
  afterwards = mapped_elsewhere;
}

static void direct_io(struct command *c) {
  const int fd = file_for(O_DIRECT);
  const ssize_t done = pwrite(fd, at(c, 0), c->bytes, 0);
  if (c->kflags & KFLAG_DIRECT_IO)
    expect(done == (ssize_t)c->bytes, "O_DIRECT from the target core's pages");
  else
    expect(done < 0 && (errno == EFAULT || errno == EEXIST), "O_DIRECT from an initiator's pages");
  close(fd);
}

/* Everything of the entry but cmd_id is scribbled over: the kernel must not look at it. */
static void scribble(struct entry *e) {
  for (int i = 0; i < 3; i++) e->iov[i] = (struct iov){0xdeadbeef000, 1 << 30};
}

static int is_write(const struct command *c) { return (c->cdb[0] & 0x1f) == 0x0a; }

static struct {
  const char *name;
  int on_write;
  void (*run)(struct command *);
} probes[] = {
    {"none", 0, NULL},
    {"read-only", 1, read_only},
    {"late", 0, late_use},
    {"elsewhere", 1, elsewhere_too},
    {"direct", 1, direct_io},
    {"short", 0, NULL},
    {"failed", 0, NULL},
    {"unfilled", 0, NULL},
    {"keep", 1, late_use},
    {"scribble", 1, late_use},
};
enum { SHORT = 5, FAILED, UNFILLED, KEEP, SCRIBBLE, PROBES };

/* --- SCSI, as little as a disk needs --- */

static uint64_t be(const uint8_t *from, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; i++) value = value << 8 | from[i];
  return value;
}

static void put(uint8_t *to, uint64_t value, int bytes) {
  while (bytes--) to[bytes] = (uint8_t)value, value >>= 8;
}

static void answer(struct command *c, const uint8_t *from, size_t bytes) {
  for (unsigned i = 0; i < c->count; i++) {
    const size_t part = bytes < c->iov[i].len ? bytes : c->iov[i].len;
    memcpy(at(c, i), from, part);
    memset(at(c, i) + part, 0, c->iov[i].len - part);
    from += part;
    bytes -= part;
  }
}

static int sense(struct entry *e, uint8_t key, uint8_t asc) {
  memset(e->sense, 0, sizeof e->sense);
  e->sense[0] = 0x70;
  e->sense[2] = key;
  e->sense[7] = 10;
  e->sense[12] = asc;
  return CHECK_CONDITION;
}

struct move {
  uint8_t *to;
  const uint8_t *from;
  size_t bytes;
};

static void *move(void *argument) {
  const struct move *m = argument;
  memcpy(m->to, m->from, m->bytes);
  return NULL;
}

/* The threads meet in the same pages at the same time: their faults race for the same PTEs. */
static void move_by_threads(uint8_t *to, const uint8_t *from, size_t bytes) {
  enum { THREADS = 4 };
  pthread_t threads[THREADS];
  struct move parts[THREADS];
  for (int i = 0; i < THREADS; i++) {
    const size_t start = bytes / THREADS * i;
    const size_t end = i == THREADS - 1 ? bytes : start + bytes / THREADS;
    parts[i] = (struct move){to + start, from + start, end - start};
    if (pthread_create(&threads[i], NULL, move, &parts[i])) die("pthread_create");
  }
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

static void hold(struct command *c) {
  volatile uint8_t seen = 0;
  for (size_t i = 0; i < c->bytes; i += PAGE) seen ^= at(c, 0)[i];
  printf("holding %zu\n", c->bytes);
  fflush(stdout);
  for (;;) pause();
}

/* What nobody waits for: at most this many, the rest is done the proper way. */
enum { CARELESS = 16 };
static aio_context_t aio;
static unsigned pinned, pinning_refused, left_behind;

/* O_DIRECT on the data of a command; 0 is an error. */
static int direct(const struct command *c, uint8_t *data, size_t bytes, size_t offset) {
  const int writes = is_write(c), zero_copy = c->kflags & KFLAG_ZERO_COPY;
  if (mode[0] == 'c' && zero_copy && left_behind < CARELESS) {
    struct iocb one = {.aio_fildes = backing,
                       .aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                       .aio_buf = (uintptr_t)data,
                       .aio_nbytes = bytes,
                       .aio_offset = offset};
    struct iocb *list[] = {&one};
    if (syscall(SYS_io_submit, aio, 1, list) != 1) return 0;
    printf("left behind %u\n", ++left_behind);
    fflush(stdout);
    return 1;
  }
  if (zero_copy && !writes && mode[0] == 'd') {
    /* The page is there and may not be stored into: what pins it has to ask, and is allowed to. */
    (void)*(volatile uint8_t *)data;
    if (mprotect(data, bytes, PROT_READ) || mprotect(data, bytes, PROT_READ | PROT_WRITE))
      die("mprotect");
  }
  const ssize_t done =
      writes ? pwrite(backing, data, bytes, offset) : pread(backing, data, bytes, offset);
  if (zero_copy) {
    if (done == (ssize_t)bytes && c->kflags & KFLAG_DIRECT_IO) pinned++;
    else pinning_refused++;
  }
  return done == (ssize_t)bytes;
}

static int read_write(struct command *c, struct entry *e, uint64_t lba) {
  const int writes = is_write(c);
  size_t offset = lba * BLOCK;
  if (offset + c->bytes > disk_bytes) return sense(e, 5, 0x21);
  if (c->kflags & KFLAG_ZERO_COPY && writes == !!(c->kflags & KFLAG_DATA_IN)) {
    fprintf(stderr, "kernel flags 0x%x of operation code 0x%02x\n", c->kflags, c->cdb[0]);
    exit(1);
  }
  if (mode[0] == 'n') return GOOD;
  if (mode[0] == 'h' && c->bytes >= 64 << 10) hold(c);

  const unsigned probe = mode[0] == 'p' && offset / MIB < PROBES ? offset / MIB : 0;
  if (probe && writes == probes[probe].on_write) {
    if (!(c->kflags & KFLAG_ZERO_COPY)) {
      printf("probe %s FAIL: the command was copied\n", probes[probe].name);
    } else {
      probe_failed = 0;
      if (probes[probe].run) probes[probe].run(c);
      if (!afterwards) printf("probe %s %s\n", probes[probe].name, probe_failed ? "" : "ok");
    }
    fflush(stdout);
    if (probe == SHORT) {
      memset(at(c, 0), 0x5a, c->bytes / 2);
      e->uflags = UFLAG_READ_LEN;
      e->read_len = c->bytes / 2;
      return GOOD;
    }
    if (probe == FAILED) {
      memset(at(c, 0), 0x5a, c->bytes);
      return sense(e, 3, 0x11);
    }
    if (probe == UNFILLED) return GOOD;
    if (probe == SCRIBBLE) scribble(e);
    if (probe == KEEP) e->uflags = UFLAG_KEEP_BUF;
  }
  for (unsigned i = 0; i < c->count; i++) {
    uint8_t *data = at(c, i);
    const size_t bytes = c->iov[i].len;
    if (mode[0] == 'f') {
      const ssize_t done =
          writes ? pwrite(backing, data, bytes, offset) : pread(backing, data, bytes, offset);
      if (done != (ssize_t)bytes) return sense(e, 3, writes ? 0x0c : 0x11);
    } else if (backing >= 0) {
      if (!direct(c, data, bytes, offset)) return sense(e, 3, writes ? 0x0c : 0x11);
    } else if (mode[0] == 't') {
      if (writes) move_by_threads(disk + offset, data, bytes);
      else move_by_threads(data, disk + offset, bytes);
    } else if (writes) {
      memcpy(disk + offset, data, bytes);
    } else {
      memcpy(data, disk + offset, bytes);
    }
    offset += bytes;
  }
  return GOOD;
}

static int execute(struct command *c, struct entry *e) {
  static const uint8_t inquiry[36] = {0, 0, 6, 2, 31, 0, 0, 2, 'T', 'C', 'M', 'U', ' ', ' ', ' ', ' ',
                                      'z', 'c', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ',
                                      ' ', ' ', ' ', '0', '1', '0', '0'};
  uint8_t reply[32] = {0};
  const uint8_t *cdb = c->cdb;
  switch (cdb[0]) {
    case 0x00: /* TEST UNIT READY */
    case 0x35: /* SYNCHRONIZE CACHE(10), (16) */
    case 0x91:
      return GOOD;
    case 0x12:
      if (cdb[1] & 1) return sense(e, 5, 0x24);
      answer(c, inquiry, sizeof inquiry);
      return GOOD;
    case 0x1a: /* MODE SENSE(6), (10): a header, no pages */
      reply[0] = 3;
      answer(c, reply, 4);
      return GOOD;
    case 0x5a:
      reply[1] = 6;
      answer(c, reply, 8);
      return GOOD;
    case 0x25:
      put(reply, disk_bytes / BLOCK - 1, 4);
      put(reply + 4, BLOCK, 4);
      answer(c, reply, 8);
      return GOOD;
    case 0x9e:
      if ((cdb[1] & 0x1f) != 0x10) return sense(e, 5, 0x20);
      put(reply, disk_bytes / BLOCK - 1, 8);
      put(reply + 8, BLOCK, 4);
      answer(c, reply, 32);
      return GOOD;
    case 0x08:
    case 0x0a:
      return read_write(c, e, be(cdb + 1, 3) & 0x1fffff);
    case 0x28:
    case 0x2a:
      return read_write(c, e, be(cdb + 2, 4));
    case 0x88:
    case 0x8a:
      return read_write(c, e, be(cdb + 2, 8));
    case 0x53: { /* XDWRITEREAD(10), bidirectional: here Data-In is the complement of Data-Out */
      const uint8_t *out = at(c, 0);
      uint8_t *in = c->bidi ? at(c, c->count) : NULL;
      probe_failed = 0;
      expect(in && c->kflags & KFLAG_ZERO_COPY, "no zero-copy Data-In");
      expect(!(c->kflags & KFLAG_DATA_IN), "both lists are said to be Data-In");
      if (in) {
        expect(c->iov[c->count].len == c->bytes, "Data-In has another size");
        for (size_t i = 0; i < c->bytes && i < c->iov[c->count].len; i++) {
          if (in[i]) expect(0, "byte %zu of Data-In was not scrubbed", i), i = c->bytes - 1;
          in[i] = ~out[i];
        }
        expect(refused((uint8_t *)out, 1), "a store into Data-Out was taken");
        late = in;
        afterwards = late_touches;
      }
      return GOOD;
    }
    default:
      return sense(e, 5, 0x20);
  }
}

/* --- the ring --- */

static void drain(void) {
  static struct command c;
  uint32_t tail = mb->cmd_tail;
  const char *name = "bidi";
  while (tail != __atomic_load_n(&mb->cmd_head, __ATOMIC_ACQUIRE)) {
    struct entry *e = (struct entry *)(map + mb->cmdr_off + tail);
    const uint32_t length = e->len_op & ~7u;
    if ((e->len_op & 7) == 1) {
      c.cdb = map + e->cdb_off;
      c.kflags = e->kflags;
      c.count = e->iov_cnt;
      c.bidi = e->iov_bidi_cnt;
      c.bytes = 0;
      if (c.count + c.bidi > 2048) die("too many iovecs");
      for (unsigned i = 0; i < c.count + c.bidi; i++) {
        c.iov[i] = e->iov[i];
        if (i < c.count) c.bytes += c.iov[i].len;
      }
      e->uflags = 0;
      const uint8_t opcode = c.cdb[0];
      const uint64_t lba = be(c.cdb + 2, 4);
      const int status = execute(&c, e);
      e->status = status;
      served++;
      if (opcode != 0x53 && lba * BLOCK / MIB < PROBES) name = probes[lba * BLOCK / MIB].name;
    } else if ((e->len_op & 7) != 0) {
      e->uflags = 1;
    }
    tail = (tail + length) % mb->cmdr_size;
    __atomic_store_n(&mb->cmd_tail, tail, __ATOMIC_RELEASE);
    if (afterwards) break;
  }
  const uint32_t zero = 0;
  if (write(uio, &zero, 4) != 4) die("doorbell");
  if (afterwards) {
    void (*run)(void) = afterwards;
    afterwards = NULL;
    run();
    printf("probe %s %s\n", name, probe_failed ? "" : "ok");
    fflush(stdout);
  }
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: consumer /dev/uioN BYTES MODE [PATH]\n");
    return 2;
  }
  disk_bytes = strtoull(argv[2], NULL, 0);
  mode = argv[3];
  path = argc > 4 ? argv[4] : NULL;
  char name[128], size[32] = "";
  snprintf(name, sizeof name, "/sys/class/uio/%s/maps/map0/size", strrchr(argv[1], '/') + 1);
  const int fd = open(name, O_RDONLY);
  if (fd < 0 || read(fd, size, sizeof size - 1) <= 0) die(name);
  close(fd);
  map_bytes = strtoull(size, NULL, 0);
  uio = open(argv[1], O_RDWR);
  if (uio < 0) die(argv[1]);
  map = mmap(NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, uio, 0);
  if (map == MAP_FAILED) die("mmap");
  mb = (volatile struct mailbox *)map;
  if (strchr("fdc", mode[0])) {
    backing = file_for(mode[0] == 'f' ? 0 : O_DIRECT);
    if (mode[0] == 'c' && syscall(SYS_io_setup, CARELESS, &aio)) die("io_setup");
  } else if (mode[0] != 'n') {
    /* Populated: its own page faults are nothing to measure. */
    disk = mmap(NULL, disk_bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (disk == MAP_FAILED) die("disk");
  }
  struct sigaction action = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER};
  sigaction(SIGBUS, &action, NULL);
  printf("ready flags=%u window=%llu+%llu\n", mb->flags, (unsigned long long)mb->zc_off,
         (unsigned long long)mb->zc_size);
  fflush(stdout);
  for (;;) {
    while (mb->cmd_tail != __atomic_load_n(&mb->cmd_head, __ATOMIC_ACQUIRE)) drain();
    struct pollfd wait = {uio, POLLIN, 0};
    if (poll(&wait, 1, -1) < 0) die("poll");
    uint32_t events;
    if (read(uio, &events, 4) != 4) {
      if (mode[0] == 'd') printf("direct %u refused %u\n", pinned, pinning_refused);
      printf("gone after %llu commands\n", (unsigned long long)served);
      return 0;
    }
  }
}
