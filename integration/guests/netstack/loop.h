/*
 * What surrounds the stack in a guest: a virtio network card, a clock that costs nothing
 * while nobody looks, the power button, and sleep without losing an event.
 *
 * Words of the command line: ip=A.B.C.D/N (default 10.0.2.15/24), gw=A.B.C.D,
 * offload=none|checksum|large (default checksum; large: both sides pass segments of more
 * than the MSS), mrg=0 (no mergeable receive buffers), rxbuf=BYTES (small ones make frames
 * span several), and those of virtio.h.
 */
#ifndef NETSTACK_LOOP_H
#define NETSTACK_LOOP_H

#include "netstack/netstack.h"
#include "virtio/virtio.h"

/* loop_start brings up the first network card and the stack on it, announces the address
 * and watches the power button; false if there is no card. */
bool loop_start(struct net *);
/* loop_receive feeds what has arrived to the stack; it returns the number of frames. */
int loop_receive(struct net *);
/* loop_send runs net_output and tells the card. */
void loop_send(struct net *);
/* loop_sleep waits for the next frame, timer, power button, or completion on `also`, a
 * queue of another device, which may be NULL. */
void loop_sleep(struct net *, struct virtq *also);

/* power_pressed is set by the power button. */
extern volatile bool power_pressed;

/* loop_power_off enters S5; it returns after a second if nothing came of it. */
void loop_power_off(void);

#endif
