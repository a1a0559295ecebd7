-- What each source has in each cluster. The only query that reads every assignment: what is counted begins here.
-- in:  assignments(source, cluster_id, byte_len, distance, ...)
-- out: domain (the corpus is `corpus`), cluster_id, windows, bytes, distance (the sum)
SELECT source AS domain, cluster_id, count(*) AS windows, sum(CAST(byte_len AS BIGINT)) AS bytes,
       sum(CAST(distance AS DOUBLE)) AS distance
FROM assignments GROUP BY source, cluster_id
