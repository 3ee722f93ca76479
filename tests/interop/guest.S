# SPDX-License-Identifier: MIT
#
# The guest of the interop tests: a 64 KiB "BIOS" for QEMU's PC machines that notices each lost or stale page.
#
# It sweeps for ever over its working set, which begins at 1 MiB. In sweep n it checks that a page's first and last
# 32-bit word are what sweep n-1 left there, counts one error if not, and leaves its own: address xor n. Each 16th page
# (address bits 12 to 15 all set) is different: odd sweeps fill it with zeros, which the next one checks in whole, so
# that pages turn from data to zero and back while they migrate. After each sweep it prints on the first serial port
#
#     HB <sweep> <errors so far>      both as eight hexadecimal digits, then \n
#
# Sweep 0 writes without a check: tests may fill RAM as they like before the start. Outside of the working set the guest
# writes only its stack, the page below 0x8000. It executes from ROM.
#
# Parameters, at the start of the image, for build_guest.sh or whoever patches a copy of it:
#
#     offset 0    8 bytes   "MFDGUEST"
#     offset 8    le32      working set, KiB (a multiple of 4; RAM must reach 1 MiB further, below the PCI hole)
#     offset 12   le32      pause after each page, in units of 1024 ticks of the time stamp counter (about 0.4 us)
#     offset 16   le32      pause after each sweep, likewise
#     offset 20   le32      bytes from one page to the next: 4096 sweeps in order; another number of pages that has no common
#                           divisor with those of the working set makes a sweep of its own order

.set COM1, 0x3f8
.set STACK, 0x8000
.set FIRST_PAGE, 0x100000

.ifndef WORKING_SET_KIB
.set WORKING_SET_KIB, 8192
.endif
.ifndef PAUSE_PER_PAGE
.set PAUSE_PER_PAGE, 0
.endif
.ifndef PAUSE_PER_SWEEP
.set PAUSE_PER_SWEEP, 0
.endif

.ifndef STRIDE
.set STRIDE, 4096
.endif

.text
.globl start
start:
        .ascii "MFDGUEST"
working_set_kib:
        .long WORKING_SET_KIB
pause_per_page:
        .long PAUSE_PER_PAGE
pause_per_sweep:
        .long PAUSE_PER_SWEEP
stride:
        .long STRIDE

        .balign 8
gdt:    .quad 0
        .quad 0x00cf9b000000ffff        # 0x08: code, 0 to 4 GiB; "accessed" set, as ROM cannot take the CPU's write
        .quad 0x00cf93000000ffff        # 0x10: data, 0 to 4 GiB
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt

.code16
real_mode:
        cli
        inb $0x92, %al                  # address line 20: without it each odd MiB is the even one below
        orb $2, %al
        andb $0xfe, %al
        outb %al, $0x92
        lgdtl %cs:(gdt_pointer - start)
        movl %cr0, %eax
        andl $0x9fffffff, %eax          # caches on
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $0x08, $protected_mode

.code32
protected_mode:
        movw $0x10, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl $STACK, %esp
        cld

        movw $COM1 + 3, %dx             # 115200 baud, 8 bits, no interrupts, FIFO on
        movb $0x80, %al
        outb %al, %dx
        movw $COM1, %dx
        movb $1, %al
        outb %al, %dx
        incw %dx
        movb $0, %al
        outb %al, %dx
        movw $COM1 + 3, %dx
        movb $3, %al
        outb %al, %dx
        movw $COM1 + 2, %dx
        movb $7, %al
        outb %al, %dx

        xorl %ebx, %ebx                 # this sweep
        xorl %ebp, %ebp                 # errors so far
sweep:
        movl $FIRST_PAGE, %esi          # this page
        movl working_set_kib, %edx
        shll $10, %edx
        addl %esi, %edx                 # end of the working set

page:
        testl %ebx, %ebx
        jz write
        leal -1(%ebx), %eax             # what the last sweep left
        call is_zero_turn
        je check_zero
        xorl %esi, %eax
        cmpl %eax, (%esi)
        jne bad
        cmpl %eax, 4092(%esi)
        je write
        jmp bad
check_zero:
        xorl %eax, %eax
        movl %esi, %edi
        movl $1024, %ecx
        repe scasl
        je write
bad:    incl %ebp

write:
        movl %ebx, %eax
        call is_zero_turn
        je write_zero
        xorl %esi, %eax
        movl %eax, (%esi)
        movl %eax, 4092(%esi)
        jmp page_done
write_zero:
        xorl %eax, %eax
        movl %esi, %edi
        movl $1024, %ecx
        rep stosl
page_done:
        movl pause_per_page, %ecx
        call pause
        addl stride, %esi
        cmpl %edx, %esi
        jb 1f
        subl %edx, %esi                 # round to the beginning
        addl $FIRST_PAGE, %esi
1:      cmpl $FIRST_PAGE, %esi
        jne page

        movb $'H', %al
        call put
        movb $'B', %al
        call put
        movl %ebx, %edi
        call put_word
        movl %ebp, %edi
        call put_word
        movb $'\n', %al
        call put

        movl pause_per_sweep, %ecx
        call pause
        incl %ebx
        jmp sweep

# Whether page %esi is zero after sweep %eax: "equal" if so. Uses %ecx.
is_zero_turn:
        movl %esi, %ecx
        shrl $12, %ecx
        orl $0xfffffff0, %ecx
        incl %ecx                       # 0 for each 16th page
        jnz 1f
        movl %eax, %ecx
        andl $1, %ecx
        decl %ecx
1:      ret                             # the flags are those of the last inc or dec

# Waits for %ecx x 1024 ticks, less when the counter jumps (after a migration). By time, not by turns of a loop: one
# turn takes three hundred times as long under a software KVM as under TCG. Uses %eax, %edi.
pause:
        jecxz 2f
        pushl %edx
        rdtsc
        shrdl $10, %edx, %eax
        movl %eax, %edi
1:      rdtsc
        shrdl $10, %edx, %eax
        subl %edi, %eax
        cmpl %ecx, %eax
        jb 1b
        popl %edx
2:      ret

# Prints a space and %edi as eight hexadecimal digits. Uses %eax, %ecx, %edi.
put_word:
        movb $' ', %al
        call put
        movl $8, %ecx
1:      roll $4, %edi
        movl %edi, %eax
        andb $15, %al
        addb $'0', %al
        cmpb $'9', %al
        jbe 2f
        addb $'a' - '9' - 1, %al
2:      call put
        loop 1b
        ret

# Prints %al when the transmitter is ready.
put:
        pushl %edx
        movb %al, %ah
        movw $COM1 + 5, %dx
1:      inb %dx, %al
        testb $0x20, %al
        jz 1b
        movw $COM1, %dx
        movb %ah, %al
        outb %al, %dx
        popl %edx
        ret

.org 0xfff0
.code16
        jmp real_mode                   # where the CPU starts
.org 0x10000
