/*
 * The hold-off of a Xen ring: two ends that sleep, and wake each other only when asked to. For spin.
 *
 *     spin -a ring.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m100000       expect: errors: 0
 *     spin -DNO_BARRIER_IN_PUSH -a ring.pml && ...                              expect: errors: 1
 *
 * Memory is that of x86 (TSO): a store goes into a buffer of its processor, and from there to memory in order and
 * at any time; a fence waits until the buffer is empty. "errors: 0" says: in no order of things does one end sleep
 * for ever (spin: invalid end state), read a message that is not the next one, or see an index that cannot be; and
 * no end is woken more often than it asked. tests/rings/model.py does the same on the source of rings/ring.py;
 * this file is for those who would rather read Promela.
 */
#ifndef R
#define R 2 /* slots */
#endif
#ifndef N
#define N 4 /* messages */
#endif
#define START 254 /* indices are bytes here, and wrap on the way */
#define BACK 1
#define FRONT 0
#define REQ_PROD 0 /* the event of a producer index follows it */
#define RSP_PROD 2
#define SLOT(index) (4 + ((index) % R))
#define REQUEST 100
#define RESPONSE 200
#define DISTANCE(a, b) (((a) - (b)) & 255)

byte mem[4 + R];
chan buffer[2] = [8] of { byte, byte };
bool woken[2];
short asked[2] = 1; /* notifications asked for and not yet sent: the page is formatted with both events set */

#define STORE(who, word, value) buffer[who]!(word), (value)
#define FENCE(who) empty(buffer[who])

#ifdef NO_BARRIER_IN_PUSH
#define FENCE_IN_PUSH(who) skip
#else
#define FENCE_IN_PUSH(who) FENCE(who)
#endif
#ifdef NO_BARRIER_IN_CHECK
#define FENCE_IN_CHECK(who) skip
#else
#define FENCE_IN_CHECK(who) FENCE(who)
#endif
#ifdef EVENT_TOO_EARLY
#define EVENT(cons) (cons)
#else
#define EVENT(cons) ((cons) + 1)
#endif
#ifdef ROOM_FOR_ONE_TOO_MANY
#define SLOTS (R + 1)
#else
#define SLOTS R
#endif

proctype memory(byte who)
{
    byte word, value;
end:
    do
    :: atomic { buffer[who]?word, value -> mem[word] = value }
    od
}

/* RING_PUSH_..._AND_CHECK_NOTIFY */
inline push(who, own_prod)
{
    STORE(who, own_prod, prod);
    FENCE_IN_PUSH(who);
    event = mem[own_prod + 1];
    atomic {
        if
        :: DISTANCE(prod, event) < DISTANCE(prod, pushed) ->
            asked[1 - who]--;
            assert(asked[1 - who] >= 0);
            woken[1 - who] = true
        :: else
        fi;
        pushed = prod
    }
}

/* RING_FINAL_CHECK_FOR_..., and sleep */
inline rest(who, peer_prod)
{
    atomic {
        if
        :: armed != ((EVENT(cons)) & 255) -> armed = EVENT(cons); asked[who]++
        :: else
        fi;
        STORE(who, peer_prod + 1, armed)
    }
    FENCE_IN_CHECK(who);
    if
    :: mem[peer_prod] == cons -> atomic { woken[who] -> woken[who] = false }
    :: else
    fi
}

proctype front()
{
    byte prod = START, pushed = START, cons = START, armed = START + 1, event, sent, got;

    do
    :: got == N -> break
    :: else ->
        do
        :: sent < N && DISTANCE(prod, cons) < SLOTS ->
            STORE(FRONT, SLOT(prod), REQUEST + sent);
            prod++;
            sent++
        :: prod != pushed && DISTANCE(prod, cons) > 0 -> break
        :: sent == N || DISTANCE(prod, cons) >= SLOTS -> break
        od;
        if
        :: prod != pushed -> push(FRONT, REQ_PROD)
        :: else
        fi;
        if
        :: mem[RSP_PROD] != cons ->
            assert(DISTANCE(mem[RSP_PROD], cons) <= DISTANCE(prod, cons));
            assert(mem[SLOT(cons)] == RESPONSE + got);
            cons++;
            got++
        :: else -> rest(FRONT, RSP_PROD)
        fi
    od
}

proctype back()
{
    byte prod = START, pushed = START, cons = START, armed = START + 1, event, done;

    do
    :: done == N -> break
    :: else ->
        if
        :: mem[REQ_PROD] != cons ->
            do
            :: mem[REQ_PROD] != cons ->
                assert(DISTANCE(mem[REQ_PROD], prod) <= R);
                assert(mem[SLOT(cons)] == REQUEST + done);
                cons++;
                STORE(BACK, SLOT(prod), RESPONSE + done);
                prod++;
                done++
            :: prod != pushed -> break
            od;
            push(BACK, RSP_PROD)
        :: else -> rest(BACK, REQ_PROD)
        fi
    od
}

init {
    atomic {
        mem[REQ_PROD] = START; mem[REQ_PROD + 1] = START + 1;
        mem[RSP_PROD] = START; mem[RSP_PROD + 1] = START + 1;
        run memory(FRONT);
        run memory(BACK);
        run front();
        run back()
    }
}
