// SPDX-License-Identifier: Apache-2.0
/** Failures tell programs what to do. */
import { TcmuError } from 'tcmu';
import { describe, expect, it } from 'vitest';
import { failureKind, ObjectStoreError } from '../src/object-store.js';

describe('a failed request', () => {
  it('has a code made of its kind, and says whether it may have been carried out', () => {
    const cut = new ObjectStoreError('outage', 'put a: connection reset', { operation: 'put' });
    const gone = new ObjectStoreError('no-bucket', 'put a: no bucket', { status: 404 });
    expect(TcmuError.is(cut)).toBe(true);
    expect([cut.code, cut.ambiguous]).toEqual(['ERR_TCMU_S3_OUTAGE', true]);
    expect([gone.code, gone.ambiguous, gone.status]).toEqual(['ERR_TCMU_S3_NO_BUCKET', false, 404]);
    expect(failureKind(gone)).toBe('no-bucket');
    expect(failureKind(new Error('other'))).toBeUndefined();
  });
});
