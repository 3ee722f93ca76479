// SPDX-License-Identifier: MIT
//
// Process 1 of linux_guest.py's guest, and all its programs. It tells on the serial port, from inside, what a core of this
// guest has to have: where the kernel says that its VMCOREINFO note is, the bytes there, the note of /proc/kcore, and which
// processes there are. Then one of them rewrites and checks memory ("HB sweep errors", as guest.S does).
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

enum { page = 4096, working_set = 8 << 20, most_note = 64 << 10 };

static void fail(const char* what) {
  printf("\nFAIL %s: %m\n", what);
  for (;;) pause();
}

static void hex(const char* name, const unsigned char* bytes, size_t size) {
  printf("\nBEGIN %s", name);
  for (size_t i = 0; i < size; ++i) printf("%s%02x", i % 64 ? "" : "\n", bytes[i]);
  printf("\nEND %s\n", name);
}

static unsigned char* read_at(int file, uint64_t at, size_t size) {
  unsigned char* bytes = malloc(size);
  for (size_t have = 0; have < size;) {
    const ssize_t got = pread(file, bytes + have, size - have, (off_t)(at + have));
    if (got <= 0) fail("/proc/kcore");
    have += (size_t)got;
  }
  return bytes;
}

static void tell_note_of_kcore(const unsigned char* notes, size_t size) {
  for (size_t at = 0; at + sizeof(Elf64_Nhdr) <= size;) {
    Elf64_Nhdr head;
    memcpy(&head, notes + at, sizeof head);
    const size_t text = at + sizeof head + (head.n_namesz + 3) / 4 * 4;
    if (text > size || head.n_descsz > size - text) fail("a note of /proc/kcore");
    if (strncmp((const char*)notes + at + sizeof head, "VMCOREINFO", head.n_namesz) == 0)
      hex("kcore", notes + text, head.n_descsz);
    at = text + (head.n_descsz + 3) / 4 * 4;
  }
}

static void tell_vmcoreinfo(void) {
  unsigned long long address = 0, size = 0;
  FILE* told = fopen("/sys/kernel/vmcoreinfo", "r");
  if (!told || fscanf(told, "%llx %llx", &address, &size) != 2 || size > most_note) fail("/sys/kernel/vmcoreinfo");
  printf("\nVMCOREINFO %llx %llx\n", address, size);
  const int kcore = open("/proc/kcore", O_RDONLY);
  if (kcore < 0) fail("/proc/kcore");
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)read_at(kcore, 0, sizeof *head);
  const Elf64_Phdr* rows = (const Elf64_Phdr*)read_at(kcore, head->e_phoff, head->e_phnum * sizeof *rows);
  for (int i = 0; i < head->e_phnum; ++i) {
    const Elf64_Phdr* row = &rows[i];
    if (row->p_type == PT_NOTE)
      tell_note_of_kcore(read_at(kcore, row->p_offset, row->p_filesz), row->p_filesz);
    else if (row->p_paddr != ~0ull && row->p_paddr <= address && address + size <= row->p_paddr + row->p_filesz)
      hex("memory", read_at(kcore, row->p_offset + address - row->p_paddr, size), size);
  }
}

static pid_t start(const char* name, void (*run)(void)) {
  fflush(stdout);
  const pid_t pid = fork();
  if (pid < 0) fail("fork");
  if (pid == 0) {
    prctl(PR_SET_NAME, name);
    run();
  }
  printf("\nPROCESS %d %s\n", pid, name);
  return pid;
}

static void sleeps(void) {
  for (;;) pause();
}

static void writes(void) {
  volatile uint32_t* const memory = calloc(working_set, 1);
  if (!memory) fail("memory");
  for (uint32_t sweep = 1, errors = 0;; ++sweep) {
    for (size_t at = 0; at < working_set / 4; at += page / 4) {
      errors += memory[at] != sweep - 1;
      memory[at] = sweep;
      if (at % (working_set / 64) == 0) usleep(5000);
    }
    printf("HB %x %x\n", sweep, errors);
    fflush(stdout);
  }
}

int main(void) {
  mkdir("/proc", 0755);
  mkdir("/sys", 0755);
  mkdir("/dev", 0755);
  if (mount("proc", "/proc", "proc", 0, "") || mount("sysfs", "/sys", "sysfs", 0, "")) return 1;
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  const int serial = open("/dev/ttyS0", O_RDWR);
  if (serial < 0) return 1;
  for (int i = 0; i < 3; ++i) dup2(serial, i);
  struct utsname system;
  uname(&system);
  printf("\nLINUX %s\n", system.release);
  tell_vmcoreinfo();
  start("multifd-alpha", sleeps);
  start("multifd-beta", sleeps);
  start("multifd-gamma", sleeps);
  start("multifd-writer", writes);
  fflush(stdout);
  for (;;) {
    wait(NULL);
    sleep(1);
  }
}
