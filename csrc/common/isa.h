// Which instruction set level serves: what the build has, the processor offers and the operating system saves.
#pragma once

#include <cstring>
#include <initializer_list>

#include "error.h"
#include "matmul.h"
#include "rows.h"

namespace mc {

struct IsaLevel {
    const char* name;
    const RowOps* rows;  // its name says which unit of rows this is: several levels share the best one
    const MatmulOps* matmul;
    bool here, only_by_name;
    const char* unit;  // of an op's own primitives: those of `name`, or else of this, or else those beside `rows` serve
};

// The level in use. Throws Error(MC_UNAVAILABLE) if MC_CPU_ISA names one that cannot serve.
const IsaLevel& isa_level();

// Whether a stream in the order of memory is faster where the program fetches what comes next: on Intel's processors by a
// third, on AMD's it is slower by a tenth (bench/README.md, "Packed weights" and "Reading weights").
bool streams_want_fetches();

// Its row primitives.
const RowOps& row_ops();

// An op's own primitives, which it has per unit of rows: the table whose name is that of `rows`.
template <class Ops>
const Ops& ops_beside(const RowOps& rows, const char* op, std::initializer_list<const Ops*> tables) {
    for (const Ops* ops : tables) {
        if (ops && !std::strcmp(ops->name, rows.name)) return *ops;
    }
    throw Error(MC_UNAVAILABLE, std::string(op) + " has no instruction set level " + rows.name);
}

// As above, for an op that may have primitives of the level's own.
template <class Ops>
const Ops& ops_of(const IsaLevel& level, const char* op, std::initializer_list<const Ops*> tables) {
    for (const char* name : {level.name, level.unit}) {
        for (const Ops* ops : tables) {
            if (ops && !std::strcmp(ops->name, name)) return *ops;
        }
    }
    return ops_beside(*level.rows, op, tables);
}

}  // namespace mc
