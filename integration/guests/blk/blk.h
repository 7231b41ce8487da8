/* The modes of the disk guest share one disk and one source of random numbers. */
#ifndef BLK_H
#define BLK_H

#include "virtio/block.h"

extern struct block disk;
extern u64 area; /* sectors that the guest uses, from 0 */

/* random is xorshift64* from the command line's seed; below draws from 0 to n-1. */
u64 random(void);
u64 below(u64 n);

void verify(void);
void bench(void);
void hostile(void);

#endif
