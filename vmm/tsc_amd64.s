#include "textflag.h"

// func readTSC() uint64
//
// The fences keep the reading in its place: RDTSC alone may be carried out early or late (Intel SDM vol. 2, RDTSC).
TEXT ·readTSC(SB), NOSPLIT, $0-8
	LFENCE
	RDTSC
	LFENCE
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET
