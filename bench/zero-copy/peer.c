// SPDX-License-Identifier: Apache-2.0
/*
 * The other end of the socket handler, in the place of an object store: `peer PATH` listens on a Unix socket.
 * Requests are 8 bytes, u32 kind and u32 length: kind 1 is followed by that many bytes, which are read, dropped and
 * acknowledged with one byte; kind 0 is answered with that many bytes. One connection, in order.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char data[1 << 20];

static int all(int fd, size_t bytes, int out) {
  while (bytes > 0) {
    const size_t part = bytes < sizeof data ? bytes : sizeof data;
    const ssize_t done = out ? write(fd, data, part) : read(fd, data, part);
    if (done <= 0) return 0;
    bytes -= done;
  }
  return 1;
}

int main(int argc, char **argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (argc != 2) return 2;
  strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1)) return 1;
  const int fd = accept(listener, NULL, NULL);
  uint32_t request[2];
  while (recv(fd, request, sizeof request, MSG_WAITALL) == sizeof request) {
    if (!all(fd, request[1], request[0] == 0)) break;
    if (request[0] == 1 && write(fd, data, 1) != 1) break;
  }
  return 0;
}
